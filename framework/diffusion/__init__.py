"""What is learnt and how it is sampled: noise schedules, objectives, guidance, samplers.

Plain torch; knows `framework.batch` and `framework.seeding` and nothing of data, training or Ray.
"""
