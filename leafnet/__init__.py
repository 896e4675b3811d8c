"""ResNet50 transfer learning and batch scoring of leaf photographs on Ray and tf.distribute.

Importing this package imports neither TensorFlow nor Ray.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leafnet.models.bundle import Bundle

__version__ = "0.1.0"


def load_model(url: str) -> "Bundle":
    """The published model at `url`: runs/NAME/model, REGISTRY/champion, or a URL of either.

    Raises:
        UserError: there is none, it is damaged, or another version wrote it.
    """
    # Here, so that importing leafnet stays light.
    from leafnet.models import bundle

    return bundle.load(url)
