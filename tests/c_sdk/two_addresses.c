/* getaddrinfo() that gives the name two.test the addresses 127.0.0.2 and 127.0.0.1; linked with --wrap=getaddrinfo. */
#define _POSIX_C_SOURCE 200809L

#include <netdb.h>
#include <string.h>
#include <sys/socket.h>

int __real_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found);
int __wrap_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found);

int __wrap_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    int failed;

    if (strcmp(node, "two.test") != 0)
        return __real_getaddrinfo(node, service, hints, found);
    failed = __real_getaddrinfo("127.0.0.2", service, hints, found);
    return failed != 0 ? failed : __real_getaddrinfo("127.0.0.1", service, hints, &(*found)->ai_next);
}
