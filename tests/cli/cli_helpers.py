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
TINY_ARGUMENTS = [text for setting in TINY for text in ("--set", setting)]
