"""Data: prompt files and preference pairs."""
