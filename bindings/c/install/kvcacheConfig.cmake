# libkvcache for find_package(kvcache): the targets kvcache::kvcache (shared) and
# kvcache::kvcache_static, whichever are installed. Paths are found from where this file lies
# (PREFIX/share/cmake/kvcache), so an installation may be moved as a whole.
get_filename_component(_kvcache_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(_kvcache_suffixes lib lib64)
if(CMAKE_LIBRARY_ARCHITECTURE)
  list(PREPEND _kvcache_suffixes lib/${CMAKE_LIBRARY_ARCHITECTURE})
endif()

foreach(_kvcache_dir IN LISTS _kvcache_suffixes)
  set(_kvcache_dir "${_kvcache_prefix}/${_kvcache_dir}")
  if(NOT TARGET kvcache::kvcache AND EXISTS "${_kvcache_dir}/libkvcache.so")
    add_library(kvcache::kvcache SHARED IMPORTED)
    set_target_properties(kvcache::kvcache PROPERTIES
      IMPORTED_LOCATION "${_kvcache_dir}/libkvcache.so"
      INTERFACE_INCLUDE_DIRECTORIES "${_kvcache_prefix}/include")
  endif()
  if(NOT TARGET kvcache::kvcache_static AND EXISTS "${_kvcache_dir}/libkvcache.a")
    add_library(kvcache::kvcache_static STATIC IMPORTED)
    set_target_properties(kvcache::kvcache_static PROPERTIES
      IMPORTED_LOCATION "${_kvcache_dir}/libkvcache.a"
      INTERFACE_INCLUDE_DIRECTORIES "${_kvcache_prefix}/include"
      INTERFACE_LINK_LIBRARIES "gcc_s;util;rt;pthread;m;dl;c")
  endif()
endforeach()

set(kvcache_FOUND TRUE)
if(NOT TARGET kvcache::kvcache AND NOT TARGET kvcache::kvcache_static)
  set(kvcache_FOUND FALSE)
  set(kvcache_NOT_FOUND_MESSAGE "no libkvcache.so or libkvcache.a below ${_kvcache_prefix}")
endif()
unset(_kvcache_prefix)
unset(_kvcache_suffixes)
unset(_kvcache_dir)
