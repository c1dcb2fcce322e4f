"""What a network is trained to do: the contract, and one file for each objective.

Plain torch; knows `framework.batch`, `framework.seeding` and `framework.diffusion`."""
