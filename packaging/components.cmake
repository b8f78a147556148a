# Read by CPack once for each package that it makes.
if(CPACK_GENERATOR STREQUAL "DEB")
  set(own debian)
  set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
  set(CPACK_SET_DESTDIR ON)  # for /etc/default
  set(CPACK_INSTALL_PREFIX /usr)
else()
  set(own tarball)
endif()
set(CPACK_INSTALL_CMAKE_PROJECTS "${CPACK_INDEXCACHE_BUILD};indexcache;program;/"
                                 "${CPACK_INDEXCACHE_BUILD};indexcache;${own};/")
