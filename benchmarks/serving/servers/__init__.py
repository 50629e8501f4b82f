"""One short file for each server, written as its own documentation would; all run workload.Workload."""
