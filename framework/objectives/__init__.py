"""What a network is trained to do: the contract, and an objective a file.

Plain torch; knows `framework.batch`, `framework.seeding` and `framework.diffusion`."""
