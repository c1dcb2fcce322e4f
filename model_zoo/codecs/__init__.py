"""Video codecs: frames to normalised latents and back, one file each."""
