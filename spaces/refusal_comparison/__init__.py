"""The files of a Space, a package so that they are installed too; `agl-trl space --push` uploads those beside this one."""
