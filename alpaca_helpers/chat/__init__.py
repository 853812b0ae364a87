"""A chat with a run's model: `box` for notebooks (ipywidgets), `terminal` for a shell; both draw one `conversation`."""
