"""Quality of a student against its teacher."""

from fraqat.evaluation.color_digits import ColorDigitsJudge
from fraqat.evaluation.frechet import frechet_distance
from fraqat.evaluation.image import EvaluationSpec, ImageQuality, image_quality, median_psnr_db, paired_psnr_db
from fraqat.evaluation.specs import LanguageEvaluationSpec, SpeechEvaluationSpec

__all__ = [
    "ColorDigitsJudge",
    "EvaluationSpec",
    "ImageQuality",
    "LanguageEvaluationSpec",
    "SpeechEvaluationSpec",
    "frechet_distance",
    "image_quality",
    "median_psnr_db",
    "paired_psnr_db",
]
