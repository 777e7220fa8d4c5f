"""Where people sample already: basinescape inside other packages' pipelines, one file a host."""
