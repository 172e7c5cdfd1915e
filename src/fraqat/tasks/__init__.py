"""Model families as tasks for the trainer. The only home of diffusers and transformers.

Importing this package loads neither: import `fraqat.tasks.diffusion` and `fraqat.tasks.pipelines` where models are needed.
"""

from fraqat.tasks.families import ARCHITECTURES, Architecture, architecture_named, architecture_of
from fraqat.tasks.spec import ModelSpec, SamplerSpec

__all__ = ["ARCHITECTURES", "Architecture", "ModelSpec", "SamplerSpec", "architecture_named", "architecture_of"]
