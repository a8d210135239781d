"""Who quantizes and multiplies.

``reference`` is the definition and takes everything; the others give the same codes, and native matrix products within
a stated error. ``choose`` is the door.
"""

from .choose import NATIVE as NATIVE
from .choose import ORDER as ORDER
from .choose import QUANTIZERS as QUANTIZERS
from .choose import REFERENCE as REFERENCE
from .choose import Choice as Choice
from .choose import choose as choose
from .choose import require_backend as require_backend
from .interface import Backend as Backend
from .interface import Cast as Cast
from .interface import Operand as Operand
from .interface import Product as Product
from .interface import Quantizer as Quantizer
from .interface import quantize_by as quantize_by
