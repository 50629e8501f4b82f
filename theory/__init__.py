"""Theory labs: small experiments that check the papers' predictions, one file each."""

NAMES = (
    "measurement",
    "strong-augmentation",
    "implicit-regularization",
    "projector",
    "noncontrastive-dynamics",
    "eigenspace-alignment",
    "directpred",
    "frustration",
    "barlow-twins",
)
