"""The dashboard of all replicas: verdicts, spectra, canaries and what the monitors cost."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.grafana.panels import bars_by_rank, board, by_rank, lines, query, states, variable
from tools.grafana.queries import EACH, ENCODER, NAMED, OF, PER, RECENT, rate, threshold


def fleet() -> Dashboard:
    duplicates = rate("fullrank_rows_total", "instance, model", f'{OF},fate="duplicate"')
    return board(
        "fullrank-fleet",
        "fullrank: fleet overview",
        variable("instance", "Replica", "label_values(fullrank_verdict, instance)"),
        variable("model", "Encoder", 'label_values(fullrank_verdict{instance=~"$instance"}, model)'),
        "Is it well?",
        states(
            "Verdict",
            "One row for each verdict that a replica had. Exactly one holds at a time.",
            query(f"sum by (instance, model, state) (fullrank_verdict{{{OF}}}) == 1", f"{EACH}: {{{{state}}}}"),
        ),
        lines(
            "Revisions in service",
            "How many replicas serve each. Two of one encoder are two encoders: their figures are never averaged. More "
            "than one is right during a rollout only.",
            query(f"count {ENCODER} (fullrank_verdict{{{OF}}} == 1)", NAMED),
        ),
        "Rank of recent traffic, five minutes",
        lines(
            "Effective rank",
            "exp(entropy) of the covariance's eigenvalues. Dashed: reference and threshold. No line: too few rows.",
            query(f"max {PER} (fullrank_effective_rank{{{RECENT}}})", EACH),
            query(f"max {ENCODER} (fullrank_reference_effective_rank{{{OF}}})", f"reference {NAMED}"),
            query(*threshold("effective_rank")),
        ),
        lines(
            "Participation ratio",
            "(tr C)² / tr C², unbiased at any number of rows, with 95 % bounds. The verdict asks the upper one.",
            query(
                f"max by (instance, model, bound) (fullrank_participation_ratio{{{RECENT}}})", f"{EACH} {{{{bound}}}}"
            ),
            query(f"max {ENCODER} (fullrank_reference_participation_ratio{{{OF}}})", f"reference {NAMED}"),
            query(*threshold("participation_ratio")),
        ),
        lines(
            "Total variance of normalised embeddings",
            "Near 0 everything lies at one point, which ranks do not show.",
            query(f"max {PER} (fullrank_total_variance{{{RECENT}}})", EACH),
            query(*threshold("total_variance")),
        ),
        by_rank(
            "Energy in the reference's directions: $instance",
            "Rows: bands of directions up to a rank, the strongest first; colour: variance over the reference's. All "
            "near 1 is healthy. A low head (ranks 1, 2, 4) with the tail near 1 is narrow traffic; a tail at 0 is a "
            "collapsed subspace; a tail far above 1 is foreign images or changed preprocessing. Choose one encoder.",
            f'max by (rank) (fullrank_band_energy_ratio{{{RECENT},bound="estimate"}})',
            repeat="instance",
            width=16,
        ),
        bars_by_rank(
            "Spectrum now",
            "Eigenvalues of the covariance at ranks 1, 2, 4, 8, ...",
            f"max by (rank) (fullrank_eigenvalue{{{RECENT}}})",
            width=8,
        ),
        "Over the fleet, from counters",
        lines(
            "Participation ratio of each replica",
            "From counters, so it survives a restart and the service's windows: five minutes and an hour.",
            query(f"instance:fullrank_participation_ratio:rate5m{{{OF}}}", f"{EACH} 5m"),
            query(f"instance:fullrank_participation_ratio:rate1h{{{OF}}}", f"{EACH} 1h"),
        ),
        lines(
            "Within-replica participation ratio, weighted by variance",
            "The sum over replicas: what it says about most hides one that collapsed. The exact figure of the fleet "
            "comes from GET /moments of each replica, merged.",
            query(
                'model:fullrank_variance_weighted_within_replica_participation_ratio:rate5m{model=~"$model"}',
                "{{model}} 5m",
            ),
            query(
                'model:fullrank_variance_weighted_within_replica_participation_ratio:rate1h{model=~"$model"}',
                "{{model}} 1h",
            ),
        ),
        lines(
            "Weakest band",
            "The least of the bands' energies over the reference's, an hour: of each replica, and weighted by rows.",
            query(f"min {PER} (instance_rank:fullrank_band_energy_ratio:rate1h{{{OF}}})", EACH),
            query(
                'min by (model) (model_rank:fullrank_row_weighted_band_energy_ratio:rate1h{model=~"$model"})',
                "all of {{model}}",
            ),
        ),
        "Model or traffic?",
        lines(
            "Canary: least cosine to the stored embeddings",
            "Fixed images through the path of requests. Below the threshold the model itself has changed.",
            query(f"min {PER} (fullrank_canary_cosine_min{{{OF}}})", EACH),
            query(*threshold("canary_cosine")),
            minimum=None,
            width=6,
        ),
        lines(
            "Canary: largest angle to the stored embeddings",
            "Degrees. The threshold follows from the serving precision's own noise.",
            query(f'max {PER} (fullrank_canary_angle_degrees{{{OF},quantile="1"}})', EACH),
            query(*threshold("canary_angle")),
            width=6,
        ),
        lines(
            "Canary: neighbours kept",
            "Share of a canary image's 10 nearest canary images that still are among its 10 nearest: what a search "
            "loses. And the rank correlation of all their distances with those stored.",
            query(f"min {PER} (fullrank_canary_neighbours_overlap{{{OF}}})", f"{EACH} neighbours"),
            query(f"min {PER} (fullrank_canary_distance_correlation{{{OF}}})", f"{EACH} distances"),
            minimum=None,
            width=6,
        ),
        lines(
            "Canary: participation ratio",
            "The variety of the canary images' embeddings now.",
            query(f"min {PER} (fullrank_canary_participation_ratio{{{OF}}})", EACH),
            query(*threshold("canary_participation_ratio")),
            width=6,
        ),
        lines(
            "Shift of the mean",
            "Squared, in units of the reference's variance: a new kind of image moves it before the bands show it.",
            query(f"max {PER} (fullrank_mean_shift_ratio{{{OF}}})", EACH),
            query(*threshold("mean_shift_ratio")),
            width=8,
        ),
        lines(
            "Shift of the mean in the tail",
            "Along the trailing directions, in their own variances: changed preprocessing moves it, the mix of healthy "
            "traffic hardly does.",
            query(f"max {PER} (fullrank_tail_shift{{{OF}}})", EACH),
            query(*threshold("tail_shift")),
            minimum=None,
            width=8,
        ),
        lines(
            "Evidence against healthy traffic",
            "log10 of a sequential test's, which needs no full window. An alarm from the threshold on.",
            query(f"max {PER} (fullrank_evidence{{{OF}}})", EACH),
            query(*threshold("evidence")),
            minimum=None,
            width=8,
        ),
        lines(
            "Variety of the images themselves",
            "Participation ratio of 8x8 thumbnails. If it falls with the embeddings', it is the traffic.",
            query(f"max {PER} (fullrank_input_participation_ratio{{{OF}}})", EACH),
            width=12,
        ),
        lines(
            "Distance of the images from the reference's",
            "Between thumbnails, 0 where alike, and between textures, which noise, compression and resolution change. "
            "Above a threshold the traffic itself is different.",
            query(f"max {PER} (fullrank_input_distance{{{OF}}})", EACH),
            query(f"max {PER} (fullrank_texture_shift{{{OF}}})", f"{EACH} textures"),
            query(*threshold("input_distance")),
            query(*threshold("texture_shift", "textures unusual above")),
            width=12,
        ),
        "Beyond the spectrum",
        lines(
            "Wasserstein uniformity",
            "Distance of the embeddings' Gaussian law from an isotropic one: 0 spread evenly, 1.41 at one point.",
            query(f"max {PER} (fullrank_wasserstein_uniformity{{{RECENT}}})", EACH),
            width=6,
        ),
        lines(
            "Dead and saturated units",
            "Coordinates that hardly vary, and those stuck at one end of their range in 95 % of the sampled rows.",
            query(f"max {PER} (fullrank_dead_units{{{OF}}})", f"{EACH} dead"),
            query(f"max {PER} (fullrank_saturated_units{{{OF}}})", f"{EACH} saturated"),
            width=6,
        ),
        lines(
            "Local intrinsic dimension",
            "Of the sampled rows, with 95 % bounds: falls where embeddings collapse onto a curved surface that still "
            "fills all directions.",
            query(f"max by (instance, model, bound) (fullrank_local_dimension{{{OF}}})", f"{EACH} {{{{bound}}}}"),
            width=6,
        ),
        lines(
            "Hubness",
            "Skewness of how often a sampled row is among the 10 nearest of the others. High: a few rows are "
            "everybody's neighbours.",
            query(f"max {PER} (fullrank_hubness{{{OF}}})", EACH),
            minimum=None,
            width=6,
        ),
        lines(
            "Gaussianity",
            "Epps and Pulley's statistic over random slices: about 0.3 for a Gaussian cloud, more where rows fall into "
            "clusters.",
            query(f"max {PER} (fullrank_gaussianity{{{OF}}})", EACH),
            width=12,
        ),
        lines(
            "Copies among the sampled rows",
            "Share of sampled rows that have a copy: traffic that repeats itself, without keys to say so.",
            query(f"max {PER} (fullrank_copies_share{{{OF}}})", EACH),
            unit="percentunit",
            width=6,
        ),
        lines(
            "Answers shared by different images",
            "Share of sampled rows that equal the row of another image: a fallback, a cache or a buffer that gives "
            "one answer to many. 0 in health; a fault from 0.02 on.",
            query(f"max {PER} (fullrank_shared_answers{{{OF}}})", EACH),
            unit="percentunit",
            width=6,
        ),
        lines(
            "Do answers follow their inputs?",
            "Distance correlation of sampled rows and their images' thumbnails, with 95 % bounds. About 0 where each "
            "answer is another request's, which no other figure without the canary shows.",
            query(
                f"max by (instance, model, bound) (fullrank_input_correlation{{{OF}}})",
                f"{EACH} {{{{bound}}}}",
            ),
            query(*threshold("input_correlation", "abnormal below")),
            minimum=None,
            width=12,
        ),
        "Can it be trusted?",
        lines(
            "Rows by fate",
            "Duplicates enter once; dropped rows found the monitor's buffer full; non-finite ones are left out.",
            query(rate("fullrank_rows_total", "fate", OF), "{{fate}}"),
            unit="cps",
        ),
        lines(
            "Share of duplicates",
            "One hot image at a tenth of the rows would halve the rank, if it counted each time.",
            query(
                f"{duplicates} / {rate('fullrank_rows_total', 'instance, model', OF)}",
                EACH,
            ),
            unit="percentunit",
        ),
        lines(
            "Norms before normalising",
            "Quantiles over five minutes. Scale is invisible afterwards.",
            query(
                f"max by (instance, model, quantile) (fullrank_embedding_norm{{{RECENT}}})",
                f"{EACH} {{{{quantile}}}}",
            ),
        ),
        lines(
            "Rows behind the figures",
            "Different images in five minutes, by default of 50 a second at most; 256 are needed for a verdict.",
            query(f"max {PER} (fullrank_window_rows{{{RECENT}}})", EACH),
            width=12,
        ),
        lines(
            "The monitor itself",
            "CPU seconds a second, and the age of the statistics.",
            query(rate("fullrank_monitor_seconds_total", "instance", OF), "CPU {{instance}}"),
            query(f"max by (instance) (time() - fullrank_snapshot_timestamp_seconds{{{OF}}})", "age {{instance}}"),
            unit="s",
            width=12,
        ),
    )
