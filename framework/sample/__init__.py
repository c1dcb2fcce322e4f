"""From prompts to videos: `generate` makes frames, `contact_sheet` shows many at a glance."""
