"""Text encoders: captions to ids or embeddings, one file each."""
