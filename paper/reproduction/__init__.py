"""From experiments and stored runs to tables, figures and pages."""
