"""A committed checkpoint as a folder that diffusers, or `model_zoo.folder.load_model`, loads."""
