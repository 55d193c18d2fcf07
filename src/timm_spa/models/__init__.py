"""The model families, each on the timm family of the same name. Importing them registers their models with timm."""
from .efficientnet import *
from .resnet import *
