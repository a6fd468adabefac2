"""What a stage leaves behind: published versions with their manifests and cards, and the states that a run resumes from."""
