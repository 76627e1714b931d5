"""Data modules for images and text; validation data is split from the training set, never from the test set."""

from kd_lightning.datamodules.base import ImageDataModule
from kd_lightning.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from kd_lightning.datamodules.digits import DigitsDataModule
from kd_lightning.datamodules.image_folder import ImageFolderDataModule
from kd_lightning.datamodules.text import PythonDocsDataModule, TextBlocks
from kd_lightning.datamodules.transforms import Pipeline, crop_pipeline

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "Pipeline",
    "PythonDocsDataModule",
    "TextBlocks",
    "crop_pipeline",
]
