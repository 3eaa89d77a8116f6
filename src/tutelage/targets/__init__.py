"""What a student learns from: a live teacher or an extracted curriculum on disk, behind one interface.
How a student is trained on them is in `tutelage.training`."""
