/* lwIP's sockets, as far as hal_template.c uses them, on those of the host. */
#ifndef FAKE_LWIP_SOCKETS_H
#define FAKE_LWIP_SOCKETS_H

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef LWIP_DNS
#define LWIP_DNS 1
#endif

#define lwip_socket socket
#define lwip_connect connect
#define lwip_select select
#define lwip_fcntl fcntl
#define lwip_getsockopt getsockopt
#define lwip_recv recv
#define lwip_send(fd, data, length, flags) send((fd), (data), (length), (flags) | MSG_NOSIGNAL)
#define lwip_close close
#define lwip_htons htons

#endif
