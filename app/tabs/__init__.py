"""The page's tabs: one class each, with its components, its handlers and its words."""
