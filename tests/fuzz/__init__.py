"""Cases that are drawn at random: what one is, how it is drawn, and what has to hold for every one."""
