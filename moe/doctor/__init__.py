"""What on this machine would keep a run from working, found before it is started."""
