"""ResNet50 transfer learning and batch scoring of leaf photographs on Ray and tf.distribute.

Importing this package imports neither TensorFlow nor Ray.
"""

__version__ = "0.1.0"
