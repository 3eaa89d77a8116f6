"""Starting a whole student from its teacher, through one residual basis (`tutelage.core.residual`)."""
