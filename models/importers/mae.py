"""MAE: the encoder of a masked autoencoder, from pretraining checkpoints, or fine-tuned ones (mean pooling)."""

from models.importers.base import Checkpoint, Family, Found, Questions, imagenet, take
from models.importers.layouts import canonical


def claims(checkpoint: Checkpoint) -> bool:
    names = checkpoint.state()
    return "patch_embed.proj.weight" in names and "decoder_pos_embed" in names


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    kept, dropped = take(checkpoint.state(), "", {"decoder": "the decoder", "mask_token": "the decoder's token"})
    found = canonical(kept)
    found.dropped |= dropped
    found.facts |= {"activation": "gelu", "eps": 1e-6}
    found.preprocessing = imagenet(256, 224, "bicubic")
    found.origin = "MAE's evaluation (256, 224, bicubic)"
    return found


FAMILY = Family("mae", "MAE", claims, translate)
