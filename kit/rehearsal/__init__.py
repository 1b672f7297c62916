"""Trying on this machine what will happen on the competition machine."""
