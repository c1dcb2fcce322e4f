"""Networks in plain torch: denoisers, video codecs, text encoders."""
