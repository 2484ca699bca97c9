"""Values that no argument takes."""

import tf_adam_variants as tav

NAN, INF = float("nan"), float("inf")
ALL = (tav.AdamW, tav.QHAdam, tav.QHAdamW, tav.LAMB)
DECOUPLED = (tav.AdamW, tav.QHAdamW)

# Classes, argument, values, a part of the message.
WRONG_ARGUMENTS = [
    (ALL, "learning_rate", [-1e-3, NAN, INF, None, "fast", True, [0.1], {"a": 1}], "learning_rate"),
    (ALL, "beta_1", [-0.1, 1.0, 1.5, NAN, None, "0.9", True], r"in \[0, 1\)"),
    (ALL, "beta_2", [-0.1, 1.0, 1.5, NAN, None, "0.9", True], r"in \[0, 1\)"),
    (ALL, "epsilon", [-1e-8, NAN, INF, None, "small"], ">= 0"),
    ((*DECOUPLED, tav.LAMB), "weight_decay", [-0.1, NAN, INF, "some", True], ">= 0"),
    ((tav.QHAdam, tav.QHAdamW), "nu_1", [NAN, INF, None, "0.7"], "finite"),
    ((tav.QHAdam, tav.QHAdamW), "nu_2", [NAN, -INF, None, "1"], "finite"),
    (DECOUPLED, "weight_decay_mode", ["lr", None, 1, ["schedule"]], "'independent'"),
    (DECOUPLED, "peak_learning_rate", [0.1, 0.0], "weight_decay_mode='schedule'"),
    ((tav.AdamW,), "amsgrad", [1, None, "yes"], "True or False"),
    ((tav.LAMB,), "bias_correction", [1, None], "True or False"),
    ((tav.LAMB,), "grad_averaging", [0, "no"], "True or False"),
    ((tav.LAMB,), "trust_ratio_min", [-1.0, NAN, INF, "0"], ">= 0"),
    ((tav.LAMB,), "trust_ratio_max", [-1.0, NAN, INF, "1"], ">= 0"),
    ((tav.LAMB,), "exclude_from_layer_adaptation", ["bias", [1], ["("], 3], "regular expression"),
    (ALL, "exclude_from_weight_decay", ["bias", [1], ["(", "ok"], 3], "regular expression"),
    (ALL, "clipnorm", [-1.0, 0.0, NAN, "1"], "> 0"),
    (ALL, "clipvalue", [-1.0, 0, INF], "> 0"),
    (ALL, "global_clipnorm", [-1.0, 0, NAN], "> 0"),
    (ALL, "loss_scale_factor", [-1.0, 0.0, NAN], "> 0"),
    (ALL, "gradient_accumulation_steps", [0, 1, -2, 2.5, "2", True], "integer >= 2"),
    (ALL, "ema_momentum", [-0.1, 1.1, NAN, None], r"in \[0, 1\]"),
    (ALL, "ema_overwrite_frequency", [0, -1, 1.5, 3], "ema_overwrite_frequency"),
    (ALL, "use_ema", ["yes", 1], "True or False"),
    (ALL, "decay", [0.1], "not recognized"),
    (ALL, "momentum", [0.9], "momentum"),
    ((tav.QHAdam,), "weight_decay", [0.1], "weight_decay"),
    ((tav.QHAdam, tav.LAMB), "weight_decay_mode", ["schedule"], "weight_decay_mode"),
    ((tav.QHAdam, tav.LAMB), "peak_learning_rate", [0.1], "peak_learning_rate"),
    (ALL, "sparse_update", ["dense", None, True], "'lazy'"),
    (ALL, "fused", ["yes", None, 1], "'auto', True or False"),
    (ALL, "master_weights", ["yes", None, 1], "True or False"),
    (ALL, "stochastic_rounding", ["yes", None, 1], "True or False"),
    (ALL, "name", [3], "name"),
]
