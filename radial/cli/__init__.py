"""What every command of the project shares: settings with their meaning, their reader, and how a command ends."""
