"""Reading the configuration file.

keys        the keys of the file, what each takes; file and command line become settings
routes      the keys of routes and of pools with a name; what is wrong between routes
pools       the keys of what chooses a backend: of backends, of their checks, of pools
schema      a file's entries, read by tables of keys; all errors in them
addresses   addresses as people write them: in the file, after an option, in two or three words
values      single values: durations, numbers, switches, words
yamlfile    a YAML file as keys and values with their lines
yamlfaults  what is wrong with a file that is no YAML
"""
