"""Quality of a student against its teacher."""

from fraqat.evaluation.color_digits import ColorDigitsJudge
from fraqat.evaluation.frechet import frechet_distance
from fraqat.evaluation.image import EvaluationSpec, ImageQuality, image_quality, paired_psnr_db

__all__ = [
    "ColorDigitsJudge",
    "EvaluationSpec",
    "ImageQuality",
    "frechet_distance",
    "image_quality",
    "paired_psnr_db",
]
