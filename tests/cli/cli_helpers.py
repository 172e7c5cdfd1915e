"""Settings of the small run that the tests of the command line share."""

TINY = (
    "data.num_train=64",
    "data.num_validation=16",
    "train.steps=9",
    "train.batch_size=8",
    "train.checkpoint_every=3",
    "train.validate_every=4",
    "train.tensorboard=false",
    "evaluation.num_images=4",
    "sampler.num_steps=2",
)
SHORT = (*TINY, "train.steps=3", "schedule.kind=constant")
"""A shorter run, where stages are not what a test is about: a step of the embedded model costs as much as a test of a law."""
TINY_ARGUMENTS = [text for setting in TINY for text in ("--set", setting)]
SHORT_ARGUMENTS = [text for setting in SHORT for text in ("--set", setting)]
