"""Who is there, who is alive, who coordinates."""
