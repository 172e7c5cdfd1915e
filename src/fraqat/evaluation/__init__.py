"""Quality of a student against its teacher."""

from fraqat.evaluation.bootstrap import BootstrapSpec, Interval
from fraqat.evaluation.color_digits import ColorDigitsJudge
from fraqat.evaluation.frechet import frechet_distance
from fraqat.evaluation.image import EvaluationSpec, ImageQuality, image_quality, median_psnr_db, paired_psnr_db
from fraqat.evaluation.metric_specs import ExtractorSpec, ScoreSpec
from fraqat.evaluation.mmd import cmmd, kernel_distance
from fraqat.evaluation.perceptual import lpips_like
from fraqat.evaluation.specs import LanguageEvaluationSpec, SpeechEvaluationSpec

__all__ = [
    "BootstrapSpec",
    "ColorDigitsJudge",
    "EvaluationSpec",
    "ExtractorSpec",
    "ImageQuality",
    "Interval",
    "LanguageEvaluationSpec",
    "ScoreSpec",
    "SpeechEvaluationSpec",
    "cmmd",
    "frechet_distance",
    "image_quality",
    "kernel_distance",
    "lpips_like",
    "median_psnr_db",
    "paired_psnr_db",
]
