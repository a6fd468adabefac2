"""Sources -> rows and prompts: files and hub sets, chat templates, the shapes of public sets."""
