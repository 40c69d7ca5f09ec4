"""What makes the pipeline faster, wider or nicer to look at; it stands by itself without these."""
