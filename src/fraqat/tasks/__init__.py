"""Model families as tasks for the trainer. The only home of diffusers and transformers.

Importing this package loads neither: import `fraqat.tasks.diffusion` and `fraqat.tasks.pipelines` where models are needed.
"""

from fraqat.quiet import drop_torchao_notices
from fraqat.tasks.families import ARCHITECTURES, Architecture, architecture_named, architecture_of
from fraqat.tasks.spec import ModelSpec, SamplerSpec

drop_torchao_notices()  # diffusers imports torchao where it is

__all__ = ["ARCHITECTURES", "Architecture", "ModelSpec", "SamplerSpec", "architecture_named", "architecture_of"]
