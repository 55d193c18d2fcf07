"""Model families, each built on the timm family of the same name. The import registers their models with timm."""
from ._entrypoints import list_models as list_models
from ._gate_table import GATES as GATES
from ._gate_table import create_gate as create_gate
from ._source_names import SOURCE_NAMES as SOURCE_NAMES
from .densenet import *
from .efficientnet import *
from .gated import *
from .mobilenetv3 import *
from .resnet import *
from .resnetv2 import *
from .vgg import *
