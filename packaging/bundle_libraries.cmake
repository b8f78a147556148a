# Copies the shared libraries of `program`, all but glibc's, into the folder `libraries`, and the
# copyright of each, as its Debian package has it, into the folder `licences`.
file(GET_RUNTIME_DEPENDENCIES EXECUTABLES "${program}" RESOLVED_DEPENDENCIES_VAR dependencies
     PRE_EXCLUDE_REGEXES "^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv))\\.so")
foreach(dependency ${dependencies})
  get_filename_component(name "${dependency}" NAME)
  file(REAL_PATH "${dependency}" path)
  file(INSTALL "${path}" DESTINATION "${libraries}" RENAME "${name}")
  # /lib may be a link to /usr/lib, and the package may know either path.
  string(REGEX REPLACE "^/usr" "" short_path "${path}")
  execute_process(COMMAND dpkg-query --search "${path}" "${short_path}" OUTPUT_VARIABLE owner
                  ERROR_QUIET)
  string(REGEX MATCH "^[^:]+" package "${owner}")
  set(copyright "/usr/share/doc/${package}/copyright")
  if(NOT package OR NOT EXISTS "${copyright}")
    message(FATAL_ERROR "${path}: found no copyright of it, and without one it cannot be "
                        "distributed: make the tarball on Debian, with Debian's libraries")
  endif()
  file(INSTALL "${copyright}" DESTINATION "${licences}" RENAME "${package}")
endforeach()
