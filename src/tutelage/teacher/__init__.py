"""Where targets come from: loading teachers, calibration, and live targets."""
