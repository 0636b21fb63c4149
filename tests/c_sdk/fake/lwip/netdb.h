#ifndef FAKE_LWIP_NETDB_H
#define FAKE_LWIP_NETDB_H

#include "lwip/sockets.h"

#if LWIP_DNS

#include <netdb.h>

#define lwip_getaddrinfo getaddrinfo
#define lwip_freeaddrinfo freeaddrinfo

#endif

#endif
