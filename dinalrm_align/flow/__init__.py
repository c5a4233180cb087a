"""Rectified flow: adding noise, schedules of noise levels, ODE and SDE steps."""
