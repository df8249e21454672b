"""Images in: finding them, reading and decoding them safely, and preprocessing. Knows no model."""
