"""The worlds that come with the project, a module each. envs.py says what a world has to have."""
