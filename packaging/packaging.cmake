# Install rules, and what CPack makes of them: a tarball that runs from any folder and brings its
# libraries, and a Debian package that takes them from Debian. Used by CMakeLists.txt.
#   cmake --install build     the program, its man page, completion and documents
#   cpack --config build/CPackConfig.cmake
include(GNUInstallDirs)
set(packaging ${CMAKE_CURRENT_LIST_DIR})

# --- the component `program`: what both packages hold -------------------------------------------

# The tarball's libraries have a folder of their own: unpacked into /usr/local, they must not become
# other programs'. Old tags: oneDNN's own libraries are found there too.
set_target_properties(indexcache-cli PROPERTIES INSTALL_RPATH "$ORIGIN/../lib/indexcache")
target_link_options(indexcache-cli PRIVATE -Wl,--disable-new-dtags -Wl,-z,now)
install(TARGETS indexcache-cli COMPONENT program)

install(CODE "
  set(man \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_MANDIR}/man1\")
  file(MAKE_DIRECTORY \"\${man}\")
  execute_process(COMMAND \"${CMAKE_SOURCE_DIR}/tools/make_man\" \"$<TARGET_FILE:indexcache-cli>\"
                  OUTPUT_FILE \"\${man}/indexcache.1\" COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND gzip -9nf \"\${man}/indexcache.1\" COMMAND_ERROR_IS_FATAL ANY)
  message(STATUS \"Installing: \${man}/indexcache.1.gz\")
" COMPONENT program)
install(FILES ${packaging}/indexcache.bash RENAME indexcache
        DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions COMPONENT program)
set(documents ${CMAKE_INSTALL_DATADIR}/doc/indexcache)
install(FILES NOTICE README.md ${packaging}/copyright DESTINATION ${documents} COMPONENT program)
install(DIRECTORY docs DESTINATION ${documents} COMPONENT program)

if(INDEXCACHE_TRAIN)
  # In no package: it needs the libtorch of the machine that built it.
  install(TARGETS indexcache-train COMPONENT train)
endif()

# --- the tarball's own --------------------------------------------------------------------------

install(FILES LICENSE DESTINATION ${documents} COMPONENT tarball EXCLUDE_FROM_ALL)
install(FILES ${packaging}/indexcache.service ${packaging}/indexcache.default
        DESTINATION ${documents}/systemd COMPONENT tarball EXCLUDE_FROM_ALL)
install(CODE "
  set(program \"$<TARGET_FILE:indexcache-cli>\")
  set(libraries \"\${CMAKE_INSTALL_PREFIX}/lib/indexcache\")
  set(licences \"\${CMAKE_INSTALL_PREFIX}/${documents}/licences\")
  include(\"${packaging}/bundle_libraries.cmake\")
" COMPONENT tarball EXCLUDE_FROM_ALL)

# --- the Debian package's own -------------------------------------------------------------------

install(FILES ${packaging}/indexcache.service DESTINATION lib/systemd/system
        COMPONENT debian EXCLUDE_FROM_ALL)
# It may hold an API key.
install(FILES ${packaging}/indexcache.default RENAME indexcache DESTINATION /etc/default
        PERMISSIONS OWNER_READ OWNER_WRITE COMPONENT debian EXCLUDE_FROM_ALL)
install(FILES ${packaging}/lintian-overrides RENAME indexcache
        DESTINATION ${CMAKE_INSTALL_DATADIR}/lintian/overrides COMPONENT debian EXCLUDE_FROM_ALL)
install(CODE "
  set(changelog \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${documents}/changelog\")
  file(COPY_FILE \"${packaging}/changelog\" \"\${changelog}\")
  execute_process(COMMAND gzip -9nf \"\${changelog}\" COMMAND_ERROR_IS_FATAL ANY)
" COMPONENT debian EXCLUDE_FROM_ALL)

# --- the packages -------------------------------------------------------------------------------

set(CPACK_GENERATOR TGZ DEB)
set(CPACK_PACKAGE_NAME indexcache)
set(CPACK_PACKAGE_VENDOR "The indexcache.cpp authors")
set(CPACK_PACKAGE_CONTACT "The indexcache.cpp authors <maintainers@indexcache.invalid>"
    CACHE STRING "Who answers for the packages: NAME <ADDRESS>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "run DeepSeek-Sparse-Attention models under an index plan")
set(CPACK_PACKAGE_DESCRIPTION
"indexcache runs DeepSeek-V3.2 and GLM-5 models from Hugging Face checkpoints,
on the command line or behind an OpenAI-compatible HTTP server. It finds the
layers whose lightning indexer can go, measures what that costs and saves, and
takes the resulting index plan to vLLM, SGLang, TensorRT-LLM, transformers and
llama.cpp.
.
It needs an x86-64 CPU with AVX2.")
set(CPACK_STRIP_FILES ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE
    GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
string(TOLOWER ${CMAKE_SYSTEM_NAME} system)
set(CPACK_PACKAGE_FILE_NAME indexcache-${PROJECT_VERSION}-${system}-${CMAKE_SYSTEM_PROCESSOR})

set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_HOMEPAGE https://arxiv.org/abs/2603.12201)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_COMPRESSION_TYPE xz)
set(CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA
    "${packaging}/conffiles;${packaging}/postinst;${packaging}/prerm;${packaging}/postrm")
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)

# Which components each holds.
set(CPACK_PROJECT_CONFIG_FILE ${packaging}/components.cmake)
set(CPACK_INDEXCACHE_BUILD ${CMAKE_BINARY_DIR})
include(CPack)
