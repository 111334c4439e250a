"""The worlds that come with the project, one module each. envs.py documents their interface."""
